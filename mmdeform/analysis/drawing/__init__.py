"""Pictures of what deformable layers sample, on matplotlib figures without global state.

scene = look(detector, load_picture(detector, "image.jpg"))
places = [Place.of(detection) for detection in scene.detections(0.5)]
for kind in scene.kinds:
    draw(panels_of(kind, scene, places, DetectionsPanel.of(scene))).savefig(f"{kind}.png")
"""

from .attention import AttentionPanel, attention_panel, choose_attention
from .canvas import ColorScale, Panel, assemble, new_figure, save, to_rgb
from .convolutions import ConvolutionPanel, choose_stack, convolution_panel
from .detections import DetectionsPanel
from .keys import KeysPanel, choose_keys, keys_panel
from .pictures import Look, Row, draw, panels_of
from .roi_pooling import RoIPoolingPanel, choose_pooling, roi_pooling_panel

__all__ = [
    "AttentionPanel",
    "ColorScale",
    "ConvolutionPanel",
    "DetectionsPanel",
    "KeysPanel",
    "Look",
    "Panel",
    "RoIPoolingPanel",
    "Row",
    "assemble",
    "attention_panel",
    "choose_attention",
    "choose_keys",
    "choose_pooling",
    "choose_stack",
    "convolution_panel",
    "draw",
    "keys_panel",
    "new_figure",
    "panels_of",
    "roi_pooling_panel",
    "save",
    "to_rgb",
]
