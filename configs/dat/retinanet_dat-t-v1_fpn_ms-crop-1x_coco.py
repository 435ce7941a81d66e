_base_ = [
    "../_base_/models/retinanet_dat_fpn.py",
    "../_base_/datasets/coco_detection_ms-crop.py",
    "../_base_/schedules/adamw_1x.py",
    "../_base_/coco_runtime.py",
]
optim_wrapper = dict(optimizer=dict(lr=0.0002))
