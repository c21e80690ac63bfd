"""Submit linear probes and kNN to a cluster: flags of main_linprobe.py and of the launcher (see --help).

python submitit_linprobe.py --job_dir DIR --finetune RUN/checkpoint-last.pth \\
    --model vit_base_patch16 --data_path DATA
"""

import sys

from util.cluster.launch import launch

if __name__ == "__main__":
    sys.exit(launch("main_linprobe", about=__doc__))
