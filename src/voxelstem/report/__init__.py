"""Pictures and the one self-contained page."""
