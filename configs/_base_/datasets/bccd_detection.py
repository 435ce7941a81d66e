# BCCD, blood cells under a microscope (https://github.com/Shenggan/BCCD_Dataset, MIT licence), with
# its annotations as COCO json: train.json and val.json beside the folders train and val. Images of
# 640 x 480 are halved.
_base_ = "./shapes_instance.py"
data_root = "data/bccd/"
metainfo = dict(
    classes=("RBC", "WBC", "Platelets"), palette=[(213, 94, 0), (86, 180, 233), (240, 228, 66)]
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(320, 240), keep_ratio=True),
    dict(
        type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]
    ),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=(320, 240), keep_ratio=True),
    dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    ),
]
dataset = dict(data_root=data_root, metainfo=dict(_delete_=True, **metainfo))
train_dataloader = dict(batch_size=4, dataset=dict(pipeline=train_pipeline, **dataset))
val_dataloader = dict(batch_size=4, dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "val.json", metric="bbox")
test_evaluator = val_evaluator
