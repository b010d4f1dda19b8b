"""ComfyUI as a host: its WanModel with our packed linears in it, driven by its samplers, offloading
and LoRA nodes.

Only `loader.py`, `patcher.py` and `sampling.py` import ComfyUI, when a node runs; everything else
works, and is tested, without it. ComfyUI is GPL-3: this package calls it, and holds none of its
code.
"""
