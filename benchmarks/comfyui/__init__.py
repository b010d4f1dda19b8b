"""What ComfyUI makes of 4-bit files, computed by its own library on a CPU."""
