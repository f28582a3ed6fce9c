"""How numbers are computed: dtypes, products, masks, and whether the fused path may be taken."""
