# SPDX-License-Identifier: Apache-2.0
"""Dense Mamba against Mixture-of-Mamba at equal FLOPs: runs of several seeds, and what they say together."""
