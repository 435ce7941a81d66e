"""Spatial support: which part of an image, and which samples, a node of a network depends on.

    node = feature_node(model, images, "backbone", x=80, y=60, index=-1)
    field = effective_receptive_field(node, images)  # (H, W)
    for layer in effective_sampling(node, images):
        layer.call.locations, layer.norms
    saliency_region(node, images).mask  # (H, W)

A :class:`Node` is a function of images that gives vectors: a pixel of a feature map, the features
of a box, a query of a detection transformer. The network stays as it is: its mode, parameters,
their gradients and the random numbers. Positions are (x, y) in pixels of what the network gets;
pixel i has its centre at i.

Source: Zhu et al., "Deformable ConvNets v2" (2018), https://arxiv.org/abs/1811.11168.
"""

from .detections import (
    OUTPUTS,
    detector_run,
    is_transformer,
    query_node,
    query_of,
    query_outputs,
    roi_node,
)
from .gradients import effective_receptive_field, output_gradients
from .nodes import Node, feature_node
from .saliency import SaliencyRegion, saliency_region
from .sampling import LocationGradient, effective_sampling
from .summary import field_summary, layer_summary, share_within, strongest_samples

__all__ = [
    "OUTPUTS",
    "LocationGradient",
    "Node",
    "SaliencyRegion",
    "detector_run",
    "effective_receptive_field",
    "effective_sampling",
    "feature_node",
    "field_summary",
    "is_transformer",
    "layer_summary",
    "output_gradients",
    "query_node",
    "query_of",
    "query_outputs",
    "roi_node",
    "saliency_region",
    "share_within",
    "strongest_samples",
]
