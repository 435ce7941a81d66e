"""InternImage and FlashInternImage, convolutional backbones made of DCNv3 and DCNv4."""

from .intern_image import FlashInternImage, InternImage

__all__ = ["FlashInternImage", "InternImage"]
