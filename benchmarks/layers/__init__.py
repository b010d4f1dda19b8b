"""Recipes judged on single layers of real pretrained networks: a text encoder and a speech
recognizer.
"""
