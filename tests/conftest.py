"""What all tests share: one thread each, so that results depend on no machine and on no other test."""

import torch

torch.set_num_threads(1)
