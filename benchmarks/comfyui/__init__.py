"""ComfyUI's computation of 4-bit files, by its own library on a CPU."""
