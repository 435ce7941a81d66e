_base_ = [
    "../../_base_/models/dat_classifier.py",
    "../../_base_/datasets/imagenet_224.py",
    "../../_base_/schedules/adamw_in1k_300e.py",
    "../../_base_/mmpretrain_runtime.py",
]
