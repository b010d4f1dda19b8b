"""TempoQuant's node pack for ComfyUI.

Copy or link this folder into `custom_nodes/`, and `pip install` this repository into ComfyUI's
Python.
"""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
