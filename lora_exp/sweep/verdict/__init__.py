"""What a sweep's jobs say about its arms, and how surely."""
