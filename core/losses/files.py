"""Names of weight files that losses read by path; known before any network is built. Torch-free."""

VGG_FILE = "vgg16-397923af.pth"  # torchvision's; the name holds the start of its sha256
NEEDS_VGG = f"method.distill_loss=lpips needs method.lpips_path: the file {VGG_FILE} of torchvision"
NEEDS_DINO = "method.gan=dino needs method.dino_path: a folder of DINO or DINOv2 in transformers' format"
NEEDS_SAM = "method.gan=sam needs method.sam_path: a folder of SAM (ViT-B or ViT-H) in transformers' format"
