"""The data sets of the published runs, each once: the folder, its identities and its images.

A run states one of them and its own differences; `rec=/data/ms1mv3` on the command line names the
folder on your machine.
"""

MS1MV2 = {"rec": "/train_tmp/faces_emore", "num_classes": 85_742, "num_image": 5_822_653}
MS1MV3 = {"rec": "/train_tmp/ms1m-retinaface-t1", "num_classes": 93_431, "num_image": 5_179_510}
GLINT360K = {"rec": "/train_tmp/glint360k", "num_classes": 360_232, "num_image": 17_091_657}
WEBFACE4M = {"rec": "/train_tmp/WebFace4M", "num_classes": 205_990, "num_image": 4_235_242}
WEBFACE12M = {"rec": "/train_tmp/WebFace12M", "num_classes": 617_970, "num_image": 12_720_066}
WEBFACE42M = {"rec": "/train_tmp/WebFace42M", "num_classes": 2_059_906, "num_image": 42_474_557}
# WebFace12M with label noise: images moved to other identities, and identities split in two.
WEBFACE12M_FLIP40 = {**WEBFACE12M, "rec": "/train_tmp/WebFace12M_FLIP40"}
WEBFACE12M_CONFLICT = {
    **WEBFACE12M,
    "rec": "/train_tmp/WebFace12M_Conflict",
    "num_classes": 1_017_970,
}

VAL_TARGETS = ["lfw", "cfp_fp", "agedb_30"]
