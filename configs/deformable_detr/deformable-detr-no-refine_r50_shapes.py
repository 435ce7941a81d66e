# Without refinement: every layer of the decoder predicts its boxes from the first reference points.
_base_ = "./deformable-detr-refine_r50_shapes.py"
model = dict(with_box_refine=False)
