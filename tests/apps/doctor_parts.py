"""Reports as ranks of healthy hosts make them."""

from __future__ import annotations

import copy
from typing import Any

SMI = """<?xml version="1.0" ?>
<nvidia_smi_log>
  <driver_version>570.86.15</driver_version>
  <cuda_version>12.8</cuda_version>
  <gpu id="00000000:18:00.0">
    <product_name>NVIDIA H100 80GB HBM3</product_name>
    <fb_memory_usage><total>81559 MiB</total><reserved>551 MiB</reserved><used>4 MiB</used><free>81004 MiB</free></fb_memory_usage>
    <ecc_errors>
      <volatile><sram_correctable>7</sram_correctable><sram_uncorrectable_parity>0</sram_uncorrectable_parity>
        <sram_uncorrectable_secded>0</sram_uncorrectable_secded><dram_correctable>0</dram_correctable>
        <dram_uncorrectable>0</dram_uncorrectable></volatile>
      <aggregate><dram_uncorrectable>5</dram_uncorrectable></aggregate>
    </ecc_errors>
    <remapped_rows><remapped_row_pending>No</remapped_row_pending><remapped_row_failure>No</remapped_row_failure></remapped_rows>
    <temperature><gpu_temp>41 C</gpu_temp></temperature>
    <clocks_event_reasons><clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
      <clocks_event_reason_hw_slowdown>Not Active</clocks_event_reason_hw_slowdown></clocks_event_reasons>
  </gpu>
  <gpu id="00000000:2A:00.0">
    <product_name>NVIDIA H100 80GB HBM3</product_name>
    <fb_memory_usage><total>81559 MiB</total><free>40000 MiB</free></fb_memory_usage>
    <ecc_errors><volatile><dram_uncorrectable>2</dram_uncorrectable><sram_uncorrectable_parity>N/A</sram_uncorrectable_parity></volatile></ecc_errors>
    <remapped_rows><remapped_row_pending>Yes</remapped_row_pending><remapped_row_failure>Yes</remapped_row_failure></remapped_rows>
    <temperature><gpu_temp>N/A</gpu_temp></temperature>
    <clocks_throttle_reasons><clocks_throttle_reason_hw_thermal_slowdown>Active</clocks_throttle_reason_hw_thermal_slowdown></clocks_throttle_reasons>
  </gpu>
</nvidia_smi_log>
"""  # noqa: E501
"""The parts of ``nvidia-smi -q -x`` that are read: a sound GPU, and one with everything wrong."""

_REPORT: dict[str, Any] = {
    "host": "n1",
    "rank": 0,
    "versions": {"python": "3.11.7", "kernel": "6.1.0", "torch": "2.13.0", "ptl code": "0123456789ab"},
    "disks": {
        name: {"path": name, "free_gib": 100.0, "total_gib": 200.0, "kind": "ext4", "writable": True}
        for name in ("working folder", "/tmp", "HF cache", "/dev/shm")
    },
    "limits": {"open_files": 65536, "locked_kib": None},
    "processors": {"name": "EPYC", "machine": 64, "affinity": 8, "cgroup": None, "threads": "8", "load": 0.1},
    "compiler": {"c++": "/usr/bin/c++", "ninja": "/usr/bin/ninja", "nvcc": None},
    "stale_locks": [],
    "gpus": None,
    "xids": None,
    "infiniband": False,
    "cuda_visible": None,
    "cuda": None,
    "nccl": None,
    "threads": 8,
    "torch_gpus": [],
    "rates": [
        {
            "device": "cpu",
            "name": None,
            "fp32": {"flops": 1e12, "share_of_peak": None},
            "bf16": {"flops": 2e12, "share_of_peak": None},
            "memory_bytes": 1e11,
        }
    ],
    "hub": None,
    "clock_seconds": 0.0,
    "all_reduce": {"intra": 1e10, "all": 5e9},
}


def healthy(ranks: int = 4, per_host: int = 2) -> list[dict[str, Any]]:
    """Reports of equal ranks, ``per_host`` on each host."""
    return [
        {**copy.deepcopy(_REPORT), "rank": rank, "host": f"n{1 + rank // per_host}"}  # copies: tests change them
        for rank in range(ranks)
    ]
