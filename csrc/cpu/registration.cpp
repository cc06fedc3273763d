// All registrations in one unit: each alone spends some three seconds on torch's headers.

#include "causal_sgu.cpp"
#include "cumulative_mean.cpp"
#include "decay_conv.cpp"
#include "dss_step.cpp"
#include "fft_conv.cpp"
#include "fft_conv_step.cpp"
#include "gate_loop.cpp"
#include "linear_scan.cpp"
#include "sgu_step.cpp"
#include "tensors.cpp"
#include "windowed_sgu.cpp"
