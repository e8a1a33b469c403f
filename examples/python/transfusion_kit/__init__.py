# SPDX-License-Identifier: Apache-2.0
"""Text as tokens and images as continuous latents, as in Transfusion."""
