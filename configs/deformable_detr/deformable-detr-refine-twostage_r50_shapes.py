# Two-stage: the encoder proposes the boxes from which the decoder starts.
_base_ = "./deformable-detr-refine_r50_shapes.py"
model = dict(as_two_stage=True)
