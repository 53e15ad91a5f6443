"""The kinds of plug-ins. Start with `method.py`."""
