_base_ = "./cascade-mask-rcnn_dat-t-v1_fpn_ms-crop-1x_coco.py"
model = dict(backbone=dict(arch="small", version="pp", drop_path_rate=0.1))
