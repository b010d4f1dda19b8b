"""Facts from the kernels' machine code without a GPU: counted instructions, and the time that
follows from them.
"""
