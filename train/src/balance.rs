//! Balancing expert load without an auxiliary loss (report section 2.1.2), and measures of how balanced it is.

/// What to add to each expert's selection bias after a step: `gamma * sign(mean load - load)`.
///
/// `load` counts the tokens of the whole batch, over all micro-batches and ranks.
pub fn bias_step(load: &[u64], gamma: f32) -> Vec<f32> {
    let total: u64 = load.iter().sum();
    let experts = load.len() as u64;
    load.iter()
        // In whole numbers, so that an exactly average expert stays where it is.
        .map(|&load| match total.cmp(&(load * experts)) {
            std::cmp::Ordering::Greater => gamma,
            std::cmp::Ordering::Equal => 0.0,
            std::cmp::Ordering::Less => -gamma,
        })
        .collect()
}

/// MaxVio (Wang et al., 2024): largest load over mean load, minus one. Zero if nothing was routed.
pub fn max_violation(load: &[u64]) -> f64 {
    let total: u64 = load.iter().sum();
    if total == 0 {
        return 0.0;
    }
    let largest = load.iter().max().copied().unwrap_or(0);
    (largest * load.len() as u64) as f64 / total as f64 - 1.0
}

/// Experts that received nothing.
pub fn dead_experts(load: &[u64]) -> usize {
    load.iter().filter(|&&load| load == 0).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overloaded_experts_go_down_and_average_ones_stay() {
        assert_eq!(bias_step(&[4, 2, 0, 2], 0.5), [-0.5, 0.0, 0.5, 0.0]);
        assert_eq!(bias_step(&[3, 3, 3], 0.5), [0.0; 3]);
        assert_eq!(bias_step(&[0, 0], 0.5), [0.0; 2]);
        // A mean that is not whole: 7/3.
        assert_eq!(bias_step(&[2, 2, 3], 1.0), [1.0, 1.0, -1.0]);
    }

    #[test]
    fn violation_and_dead_experts() {
        assert_eq!(max_violation(&[1, 1, 1]), 0.0);
        assert_eq!(max_violation(&[4, 0, 0, 0]), 3.0);
        assert_eq!(max_violation(&[]), 0.0);
        assert_eq!(dead_experts(&[4, 0, 1, 0]), 2);
    }
}
