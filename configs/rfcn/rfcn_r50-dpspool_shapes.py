_base_ = "./rfcn_r50_shapes.py"
model = dict(
    roi_head=dict(
        bbox_head=dict(roi_layer=dict(type="mmdeform.DeformPSRoIPoolPack", trans_std=0.1))
    )
)
