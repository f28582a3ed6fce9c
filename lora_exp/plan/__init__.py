"""What a configuration needs, before anything is downloaded: parameters, memory and FLOPs, on the meta device."""
