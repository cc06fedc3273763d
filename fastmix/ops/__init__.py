from fastmix.reference import *  # placeholder until the operators land
