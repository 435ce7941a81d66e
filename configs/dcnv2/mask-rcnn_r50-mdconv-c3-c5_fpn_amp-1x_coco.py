_base_ = "./mask-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py"
optim_wrapper = dict(type="AmpOptimWrapper")
