_base_ = "./rfcn_r101_voc0712.py"
model = dict(
    roi_head=dict(
        bbox_head=dict(roi_layer=dict(type="mmdeform.DeformPSRoIPoolPack", trans_std=0.1))
    )
)
