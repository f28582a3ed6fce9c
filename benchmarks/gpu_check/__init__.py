"""What is computed on this GPU, against float64 on the CPU, against PEFT on the GPU, and how fast: `make gpu-check`."""
