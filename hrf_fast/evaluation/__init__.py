"""Panels: images from fixed noise, and numbers about them."""
