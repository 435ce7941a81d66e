_base_ = "../internimage/dino-4scale_internimage-t_8xb2-12e_coco.py"
pretrained = "https://huggingface.co/OpenGVLab/DCNv4/resolve/main/flash_intern_image_t_1k_224.pth"
model = dict(backbone=dict(type="mmdeform.FlashInternImage", init_cfg=dict(checkpoint=pretrained)))
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=0.0002))
auto_scale_lr = dict(base_batch_size=32)
