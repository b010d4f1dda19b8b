"""What the kernels' machine code says without a GPU: counted instructions, and the time that follows from them."""
