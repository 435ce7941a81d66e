# DAT-T with the geometry and neighbourhoods of DAT++, without its convolutions.
_base_ = "../{{$DAT_BASE:mask-rcnn_dat-t-v1_fpn_ms-crop-1x_coco}}.py"
model = dict(
    backbone=dict(
        arch="small",
        version="pp",
        stem_dims=64,
        conv_stem=False,
        lpu=False,
        dwc_mlp=False,
        stage_specs=("ND", "ND", "NDNDND", "DD"),
        num_groups=(1, 2, 4, 8),
    )
)
