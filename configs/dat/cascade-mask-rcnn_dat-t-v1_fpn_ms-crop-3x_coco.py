_base_ = [
    "../_base_/models/cascade-mask-rcnn_dat_fpn.py",
    "../_base_/datasets/coco_instance_ms-crop.py",
    "../_base_/schedules/adamw_3x.py",
    "../_base_/coco_runtime.py",
]
model = dict(backbone=dict(drop_path_rate=0.1))
