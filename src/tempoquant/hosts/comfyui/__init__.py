"""ComfyUI as a host: its WanModel with our packed linears in it, driven by its samplers, offloading and LoRA nodes.

Only `loader.py`, `patcher.py` and `sampling.py` import ComfyUI, when a node runs; everything else works, and is tested,
without one. ComfyUI is GPL-3: it is called, and none of its code is here.
"""
