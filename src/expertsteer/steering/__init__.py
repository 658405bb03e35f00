"""Step 4: steer a target model while it runs."""

from expertsteer.steering.hooks import Steering, check_strength
from expertsteer.steering.positions import STEERED_POSITIONS

__all__ = ["STEERED_POSITIONS", "Steering", "check_strength"]
