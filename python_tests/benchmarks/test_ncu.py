"""The names of kernels, and the table made from ncu's output."""

import pytest

from benchmarks.support.ncu import METRICS, base_name, read_launches, summary_table

UPDATE = "void sae_fast::cuda::(anonymous namespace)::update_rows<float, (int)4>(float *, long)"
PRODUCT = "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT"
HEADINGS = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream"]
UNITS = ["%", "%", "register/thread", "ns", "%", "%"]


def quoted(*cells):
    return ",".join(f'"{cell}"' for cell in cells)


def page(*launches):
    """Return a raw page like ncu's: messages, headings, units, launches; columns by name."""
    names = ["dram__throughput.avg.pct_of_peak_sustained_elapsed", "lts__t_sector_hit_rate.pct"]
    names += ["launch__registers_per_thread", "gpu__time_duration.sum"]
    names += ["sm__throughput.avg.pct_of_peak_sustained_elapsed"]
    names += ["sm__warps_active.avg.pct_of_peak_sustained_active"]
    lines = ["==PROF== Connected to process 7 (/usr/bin/python3.12)"]
    lines += ["==PROF== Disconnected from process 7", quoted(*HEADINGS, *names)]
    lines.append(quoted(*[""] * len(HEADINGS), *UNITS))
    for number, (kernel, *values) in enumerate(launches):
        lines.append(quoted(number, 7, "python3.12", "host", kernel, 1, 7, *values))
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        (UPDATE, "update_rows"),
        (PRODUCT, PRODUCT),
        ("void (anonymous namespace)::f<1>(int)", "f"),
        ("void at::native::copy<4, at::native::Fill<float>, A<char*, 1ul> >(int, B<C>)", "copy"),
        ("void cutlass::Kernel2<cutlass_80_bf16_tn>(cutlass_80_bf16_tn::Params)", "Kernel2"),
        ("void cub::CUB_300001_SM_900::detail::Onesweep<(int)1, x>(unsigned int*)", "Onesweep"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD (Device -> Device)"),
        ("plain", "plain"),
    ],
)
def test_bare_name_is_what_ncu_filters_by(name, bare):
    assert base_name(name) == bare


def test_launches_have_their_metrics_with_times_in_microseconds():
    launches = read_launches(page((UPDATE, "81.5", "12", "40", "1,234,500", "9.25", "50")))
    assert [launch.kernel for launch in launches] == ["update_rows"]
    assert launches[0].metrics.keys() == METRICS.keys()
    assert launches[0].metrics["gpu__time_duration.sum"] == pytest.approx(1234.5)
    assert launches[0].metrics["launch__registers_per_thread"] == 40


def test_table_has_medians_in_the_order_of_the_profile():
    product = (PRODUCT, "10", "90", "168", "50,000", "80", "20")
    updates = [(UPDATE, share, "10", "40", "2000", "5", "60") for share in ("70", "90", "80")]
    table = summary_table(
        read_launches(page(*updates, product)), ["absent", PRODUCT, "update_rows"]
    ).splitlines()
    assert table[0].split(" | ")[1:3] == ["launches", "µs"]
    assert table[2].startswith(f"| {PRODUCT} | 1 | 50.0 | 10.0")
    assert table[3].startswith("| update_rows | 3 | 2.0 | 80.0")


def test_output_without_a_table_is_an_error_that_shows_its_end():
    with pytest.raises(ValueError, match="at the end: ==ERROR== no permission"):
        read_launches("==PROF== Connected\n==ERROR== no permission\n")


def test_filter_that_met_no_kernel_is_an_error():
    with pytest.raises(ValueError, match="none of the kernels"):
        read_launches(page())
