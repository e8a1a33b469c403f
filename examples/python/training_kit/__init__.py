# SPDX-License-Identifier: Apache-2.0
"""What every training example needs: arguments, checkpoints that resume bitwise, metrics, the loop, plots."""
