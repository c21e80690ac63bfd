"""Submit semantic segmentation to a cluster: flags of main_segment.py and of the launcher (see --help).

python submitit_segment.py --job_dir DIR --finetune RUN/checkpoint-last.pth \\
    --model vit_base_patch16 --data_path DATA
"""

import sys

from util.cluster.launch import launch

if __name__ == "__main__":
    sys.exit(launch("main_segment", about=__doc__))
