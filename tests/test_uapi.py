"""The constants and layouts against the <linux/vfio.h> of this machine, as far as it goes."""

import subprocess
from pathlib import Path

import pytest

from vfiomig import uapi

HEADER = Path("/usr/include/linux/vfio.h")

NUMBERS = {
    "VFIO_GET_API_VERSION": uapi.VFIO_GET_API_VERSION,
    "VFIO_CHECK_EXTENSION": uapi.VFIO_CHECK_EXTENSION,
    "VFIO_SET_IOMMU": uapi.VFIO_SET_IOMMU,
    "VFIO_GROUP_GET_STATUS": uapi.VFIO_GROUP_GET_STATUS,
    "VFIO_GROUP_SET_CONTAINER": uapi.VFIO_GROUP_SET_CONTAINER,
    "VFIO_GROUP_GET_DEVICE_FD": uapi.VFIO_GROUP_GET_DEVICE_FD,
    "VFIO_DEVICE_GET_INFO": uapi.VFIO_DEVICE_GET_INFO,
    "VFIO_DEVICE_RESET": uapi.VFIO_DEVICE_RESET,
    "VFIO_DEVICE_FEATURE": uapi.VFIO_DEVICE_FEATURE,
    "VFIO_DEVICE_BIND_IOMMUFD": uapi.VFIO_DEVICE_BIND_IOMMUFD,
    "VFIO_MIG_GET_PRECOPY_INFO": uapi.VFIO_MIG_GET_PRECOPY_INFO,
    "VFIO_API_VERSION": uapi.VFIO_API_VERSION,
    "VFIO_TYPE1v2_IOMMU": uapi.VFIO_TYPE1v2_IOMMU,
    "VFIO_GROUP_FLAGS_VIABLE": uapi.VFIO_GROUP_FLAGS_VIABLE,
    "VFIO_DEVICE_FLAGS_RESET": uapi.DeviceInfoFlag.RESET,
    "VFIO_DEVICE_FLAGS_PCI": uapi.DeviceInfoFlag.PCI,
    "VFIO_MIGRATION_STOP_COPY": uapi.Capability.STOP_COPY,
    "VFIO_MIGRATION_P2P": uapi.Capability.P2P,
    "VFIO_MIGRATION_PRE_COPY": uapi.Capability.PRE_COPY,
    "VFIO_DEVICE_FEATURE_GET": uapi.Feature.GET,
    "VFIO_DEVICE_FEATURE_SET": uapi.Feature.SET,
    "VFIO_DEVICE_FEATURE_PROBE": uapi.Feature.PROBE,
    "VFIO_DEVICE_FEATURE_MIGRATION": uapi.Feature.MIGRATION,
    "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE": uapi.Feature.MIG_DEVICE_STATE,
    "VFIO_DEVICE_FEATURE_DMA_LOGGING_START": uapi.Feature.DMA_LOGGING_START,
    "VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP": uapi.Feature.DMA_LOGGING_STOP,
    "VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT": uapi.Feature.DMA_LOGGING_REPORT,
    "VFIO_DEVICE_FEATURE_MIG_DATA_SIZE": uapi.Feature.MIG_DATA_SIZE,
    "VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2": uapi.Feature.MIG_PRECOPY_INFOV2,
    "VFIO_PRECOPY_INFO_REINIT": uapi.VFIO_PRECOPY_INFO_REINIT,
} | {f"VFIO_DEVICE_STATE_{state.name}": state for state in uapi.DeviceState}

STRUCTS = {
    "vfio_device_feature": uapi.FEATURE,
    "vfio_device_feature_migration": uapi.FEATURE_MIGRATION,
    "vfio_device_feature_mig_state": uapi.FEATURE_MIG_STATE,
    "vfio_device_feature_mig_data_size": uapi.FEATURE_MIG_DATA_SIZE,
    "vfio_device_feature_dma_logging_control": uapi.FEATURE_DMA_LOGGING_CONTROL,
    "vfio_device_feature_dma_logging_range": uapi.FEATURE_DMA_LOGGING_RANGE,
    "vfio_device_feature_dma_logging_report": uapi.FEATURE_DMA_LOGGING_REPORT,
    "vfio_precopy_info": uapi.PRECOPY_INFO,
    "vfio_group_status": uapi.GROUP_STATUS,
}


def probe(expressions: list[str], tmp_path: Path) -> list[int]:
    """Return what a C compiler makes of the expressions."""
    prints = "\n".join(f'printf("%llu\\n", (unsigned long long)({text}));' for text in expressions)
    source = tmp_path / "probe.c"
    source.write_text(
        f"#include <stdio.h>\n#include <linux/vfio.h>\nint main(void) {{\n{prints}\n}}\n"
    )
    program = tmp_path / "probe"
    subprocess.run(["gcc", "-w", "-o", program, source], check=True)
    run = subprocess.run([program], check=True, capture_output=True, text=True)
    return [int(line) for line in run.stdout.split()]


@pytest.mark.skipif(not HEADER.exists(), reason="no <linux/vfio.h> on this machine")
def test_numbers_and_sizes_are_the_headers(tmp_path: Path) -> None:
    words = set(HEADER.read_text().replace("(", " ").replace("{", " ").split())
    known = {name: int(value) for name, value in NUMBERS.items() if name in words}
    sizes = {f"sizeof(struct {name})": it.size for name, it in STRUCTS.items() if name in words}
    expected = known | sizes
    # 6.1, the oldest header we meet, has these many of them.
    assert len(known) >= 27
    assert len(sizes) >= 7
    assert dict(zip(expected, probe(list(expected), tmp_path), strict=True)) == expected


def test_numbers_are_those_measured_on_running_kernels() -> None:
    assert uapi.VFIO_DEVICE_FEATURE == 0x3B75
    assert uapi.VFIO_DEVICE_BIND_IOMMUFD == 0x3B76
    assert uapi.VFIO_MIG_GET_PRECOPY_INFO == 0x3B79
    assert uapi.FEATURE.size + uapi.FEATURE_MIG_STATE.size == 16
    assert uapi.PRECOPY_INFO.size == 24
    assert uapi.FEATURE_DMA_LOGGING_CONTROL.size == 24
    assert uapi.FEATURE_DMA_LOGGING_RANGE.size == 16
    assert uapi.FEATURE_DMA_LOGGING_REPORT.size == 32
    assert uapi.BIND_IOMMUFD.size == 16
