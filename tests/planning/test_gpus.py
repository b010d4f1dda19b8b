"""A GPU's name names that card, and no other one."""

import re

import pytest

from tempoquant.errors import SettingsError
from tempoquant.kernels.gpu_names import CARDS, is_name_of
from tempoquant.planning.gpus import GPUS, gpu_named, gpu_of_capability

NAMES = {
    "RTX 3090": "rtx-3090, 3090, RTX3090, NVIDIA GeForce RTX 3090, GeForce 3090, rtx 3090 24GB",
    "RTX 4090": "rtx-4090, 4090, rtx_4090, NVIDIA GeForce RTX 4090",
    "RTX 5090": "RTX 5090, 5090, NVIDIA GeForce RTX 5090",
    "L40S": "l40s, NVIDIA L40S",
    "RTX PRO 6000": "rtx-pro-6000, PRO 6000, NVIDIA RTX PRO 6000 Blackwell Workstation Edition, "
    "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    "A100 80 GB": "a100, A100-80GB, NVIDIA A100-SXM4-80GB, A100 SXM",
    "H100 SXM": "h100, H100, h100-sxm, H100 SXM5, NVIDIA H100 80GB HBM3",
    "H200": "h200, NVIDIA H200, H200 SXM",
    "B200": "b200, NVIDIA B200",
}
OTHER_CARDS = (
    "H20, NVIDIA H20, H800, H100 PCIe, NVIDIA H100 PCIe, H100 NVL, NVIDIA H100 NVL, NVIDIA H100 80GB HBM2e, H100 96GB, "
    "GH200, NVIDIA GH200 480GB, NVIDIA GH200 144G HBM3e, NVIDIA H200 NVL, GB200, NVIDIA GB200, B100, B300, GB300, "
    "A10, NVIDIA A10, A10G, A30, A40, A800, A100X, NVIDIA A100-PCIE-40GB, NVIDIA A100-SXM4-40GB, A100-SXM4-40GB, "
    "NVIDIA A100 80GB PCIe, A100-SXM-64GB, NVIDIA A100-SXM4-80GB MIG 1g.10gb, "
    "L4, NVIDIA L4, L40, NVIDIA L40, L20, L2, L40G, 40S, Tesla T4, Tesla V100-SXM2-32GB, "
    "RTX 3090 Ti, NVIDIA GeForce RTX 3090 Ti, RTX 3080, RTX 4090 D, NVIDIA GeForce RTX 4090 D, rtx4090d, "
    "RTX 4090 48GB, NVIDIA GeForce RTX 4090 Laptop GPU, NVIDIA GeForce RTX 4080 SUPER, RTX 4090 SUPER, RTX 5090 D, "
    "RTX 5090D v2, NVIDIA GeForce RTX 5090 Laptop GPU, RTX 5080, RTX 2080 Ti, "
    "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition, RTX PRO 6000D, RTX PRO 5000, RTX 6000, RTX A6000, "
    "Quadro RTX 6000, NVIDIA RTX 6000 Ada Generation, NVIDIA RTX 5000 Ada Generation, RTX 4000 SFF Ada, "
    "RTX 4090 RTX 5090, 3, 4, 80, 90, 100, 200, 0, s, gb, h, rtx, geforce, nvidia, sxm, pro, voodoo, AMD MI300X, -"
)


def test_a_gpu_is_found_by_any_spelling_of_its_name():
    assert NAMES.keys() == GPUS.keys() == CARDS.keys()
    for card, names in NAMES.items():
        for name in (card, *names.split(", ")):
            assert gpu_named(name) is GPUS[card] and [each for each in CARDS if is_name_of(name, each)] == [card]
    assert gpu_of_capability("8.9") is GPUS["RTX 4090"] and gpu_of_capability("10.0") is GPUS["B200"]
    with pytest.raises(SettingsError, match=r"no GPU of compute capability 7\.5"):
        gpu_of_capability("7.5")


@pytest.mark.parametrize("name", ["", *OTHER_CARDS.split(", ")])
def test_a_card_that_is_not_in_the_table_is_no_card_of_the_table(name):
    with pytest.raises(SettingsError, match=f"'{re.escape(name)}' is none of .*: give one of RTX 3090, .*, B200"):
        gpu_named(name)
