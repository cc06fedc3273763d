#!/usr/bin/env bash
# bench/on_gpu.sh OUT          all that a GPU can say about this checkout, into the folder OUT:
#                              tests, then the report at the shapes of the README, and other
#                              packages' kernels where they are installed. Ten minutes.
# bench/on_gpu.sh --rehearse OUT   the same steps with tiny shapes and interpreted kernels, on
#                              a machine without a GPU.
# A step that fails does not stop the others; the last lines and the exit status tell.
set -uo pipefail
cd "$(dirname "$0")/.."
rehearse=
[ "${1:-}" = --rehearse ] && { rehearse=1; shift; }
[ $# = 1 ] || { sed -n '2,7s/^# //p' "$0"; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
failed=()
export PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}

if [ "$rehearse" ]; then
    export TRITON_INTERPRET=1
    device=cpu reach= shape="--batch 1 --seq 40 --dim 16 --heads 4"
else
    python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "torch finds no GPU here; --rehearse tries the steps without one" >&2; exit 2; }
    device=cuda reach="--long" shape="--batch 8 --seq 4096 --dim 1024 --heads 16"
fi

step() {  # name, seconds it may take, command …
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    [ "$rehearse" ] && limit=$((4 * limit))  # interpreted kernels are slow
    printf '%-28s' "$name"
    if timeout "$limit" "$@" > "$out/$name.txt" 2>&1; then
        echo "ok, $((SECONDS - began)) s"
    else
        echo "FAILED ($?), $((SECONDS - began)) s: $out/$name.txt"
        failed+=("$name")
    fi
}

impl=triton
report() {  # name, seconds, batch, steps, width, heads, operators …
    local name=$1 limit=$2 b=$3 n=$4 dim=$5 heads=$6
    shift 6
    [ "$rehearse" ] && b=1 n=40 dim=16 heads=4
    for dtype in bfloat16 float32; do
        step "$name-$dtype" "$limit" python bench/run.py --device "$device" --dtype "$dtype" \
            --batch "$b" --seq "$n" --dim "$dim" --heads "$heads" --impl "$impl" \
            --minutes "$(( limit / 60 + 1 ))" --models none --ops "$@" \
            --json "$out/$name-$dtype.json" --csv "$out/$name-$dtype.csv"
    done
}

kernels() {  # compiling is what takes time: all files at once
    local file running=() status=0
    for file in tests/triton/test_*.py; do
        python -m pytest -q -p no:cacheprovider "$file" & running+=($!)
    done
    for file in "${running[@]}"; do wait "$file" || status=1; done
    return $status
}
export -f kernels

step env 60 python -m fastmix.env
step kernels 200 bash -c kernels
step self-check 120 python bench/self_check.py --device "$device" $reach --json "$out/self-check.json"
if [ -z "$rehearse" ]; then
    step tests-gpu 120 python -m pytest -q -p no:cacheprovider -m gpu tests
fi
report scans       60 8 4096  1024 16 gate_loop linear_scan
report scans-long  60 1 65536 1024 16 gate_loop
report mixers      60 8 8192  512  8  decay_conv windowed_sgu cumulative_mean
impl=native
report fft-conv       60 8 8192  512  8  fft_conv
report fft-conv-short 60 8 2048  512  8  fft_conv
report fft-conv-long  60 1 65536 512  8  fft_conv
if [ -z "$rehearse" ] && command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck initcheck synccheck; do
        step "fft-conv-$tool" 90 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            python -m pytest -q -p no:cacheprovider tests/test_fft_conv_cuda.py \
            -k "on_a_gpu and (257- or 4097- or 8193- or 16385-) and dtype0"
    done
fi
step peers 120 python bench/peers.py --device "$device" $shape --json "$out/peers.json"

if [ ${#failed[@]} = 0 ]; then
    echo "all steps passed; results are in $out"
else
    echo "failed: ${failed[*]}"
    exit 1
fi
