# SPDX-License-Identifier: Apache-2.0
"""Other libraries' interfaces on this library's operators, one module per neighbour."""
