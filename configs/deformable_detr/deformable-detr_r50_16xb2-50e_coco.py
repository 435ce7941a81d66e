_base_ = "mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"
custom_imports = dict(imports=["mmdeform"], allow_failed_imports=False)
model = dict(type="mmdeform.DeformableDETR")
