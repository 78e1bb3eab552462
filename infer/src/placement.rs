//! Redundant experts (report section 3.4): which experts to hold twice, and where, so that devices are equally busy.
//!
//! A pure function of observed loads. Copies go one by one to the expert whose copies are busiest; they are then handed out,
//! busiest first, each to the least busy device that has a place left.

/// Where the experts of one layer are.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// Copies of each expert, at least one.
    pub copies: Vec<usize>,
    /// The experts on each device, in ascending order.
    pub devices: Vec<Vec<usize>>,
    /// The load of each device, if an expert's copies share its load equally.
    pub loads: Vec<f64>,
}

/// Why experts cannot be placed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{experts} experts and {redundant} redundant ones cannot be spread over {devices} devices: the sum must be a multiple of \
     the devices"
)]
pub struct PlacementError {
    experts: usize,
    redundant: usize,
    devices: usize,
}

impl Placement {
    /// Places experts of these loads with `redundant` more copies on `devices` devices, equally many on each.
    ///
    /// # Errors
    /// No experts or devices, or a number of copies that they cannot share equally.
    pub fn new(loads: &[u64], redundant: usize, devices: usize) -> Result<Self, PlacementError> {
        let experts = loads.len();
        if experts == 0 || devices == 0 || !(experts + redundant).is_multiple_of(devices) {
            return Err(PlacementError {
                experts,
                redundant,
                devices,
            });
        }
        let mut copies = vec![1; experts];
        let share = |copies: &[usize], expert: usize| loads[expert] as f64 / copies[expert] as f64;
        for _ in 0..redundant {
            // The first of equals.
            let busiest = (0..experts)
                .rev()
                .max_by(|&a, &b| share(&copies, a).total_cmp(&share(&copies, b)));
            copies[busiest.expect("there are experts")] += 1;
        }
        let mut order: Vec<usize> = (0..experts).collect();
        order.sort_by(|&a, &b| share(&copies, b).total_cmp(&share(&copies, a)));

        let places = (experts + redundant) / devices;
        let mut placement = Self {
            devices: vec![Vec::with_capacity(places); devices],
            loads: vec![0.0; devices],
            copies,
        };
        for expert in order {
            for _ in 0..placement.copies[expert] {
                let device = placement.least_busy(places);
                placement.devices[device].push(expert);
                placement.loads[device] += share(&placement.copies, expert);
            }
        }
        placement.devices.iter_mut().for_each(|d| d.sort_unstable());
        Ok(placement)
    }

    fn least_busy(&self, places: usize) -> usize {
        let free = (0..self.devices.len()).filter(|&device| self.devices[device].len() < places);
        free.min_by(|&a, &b| self.loads[a].total_cmp(&self.loads[b]))
            .expect("there are as many places as copies")
    }

    /// The busiest device's load over the mean: 1 is balanced. 1 if there is no load.
    pub fn imbalance(&self) -> f64 {
        imbalance(&self.loads)
    }
}

/// The imbalance of experts in their order, equally many on each device, as without redundancy.
pub fn imbalance_in_order(loads: &[u64], devices: usize) -> f64 {
    let per_device = loads.len().div_ceil(devices.max(1)).max(1);
    let sums = loads
        .chunks(per_device)
        .map(|part| part.iter().sum::<u64>() as f64);
    imbalance(&sums.collect::<Vec<_>>())
}

fn imbalance(loads: &[f64]) -> f64 {
    let mean = loads.iter().sum::<f64>() / loads.len() as f64;
    let most = loads.iter().copied().fold(0.0, f64::max);
    if mean > 0.0 { most / mean } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_busiest_experts_are_doubled_and_spread() {
        // By hand: 90 becomes 45 + 45, then 40 is less than 45 and 45 becomes 30 + 30 + 30.
        let loads = [90, 10, 40, 20];
        let placement = Placement::new(&loads, 2, 2).unwrap();
        assert_eq!(placement.copies, [3, 1, 1, 1]);
        // 40 to the first device, 30 to the second, 30 to the first, then what is left.
        assert_eq!(placement.devices, [vec![0, 1, 2], vec![0, 0, 3]]);
        assert_eq!(placement.loads, [80.0, 80.0]);
        assert_eq!(placement.imbalance(), 1.0);
        assert_eq!(imbalance_in_order(&loads, 2), 100.0 / 80.0);
    }

    #[test]
    fn copies_that_cannot_be_shared_equally_are_refused() {
        for (experts, redundant, devices) in [(8, 1, 2), (0, 2, 2), (8, 0, 0)] {
            let error = Placement::new(&vec![1; experts], redundant, devices).unwrap_err();
            assert!(error.to_string().contains("cannot be spread"), "{error}");
        }
        // No load: nothing is busier than anything else.
        assert_eq!(Placement::new(&[0; 4], 4, 2).unwrap().imbalance(), 1.0);
    }

    proptest! {
        #[test]
        fn every_copy_has_one_place_and_redundancy_bounds_the_busiest(
            loads in proptest::collection::vec(0_u64..1000, 16), redundant in 0_usize..5,
        ) {
            let devices = 4;
            let redundant = redundant * devices;
            let placement = Placement::new(&loads, redundant, devices).unwrap();
            prop_assert_eq!(placement.copies.iter().sum::<usize>(), 16 + redundant);
            for (expert, &copies) in placement.copies.iter().enumerate() {
                let places = placement.devices.iter().flatten().filter(|&&e| e == expert).count();
                prop_assert_eq!(places, copies);
            }
            prop_assert!(placement.devices.iter().all(|d| d.len() == (16 + redundant) / devices));
            let total: u64 = loads.iter().sum();
            prop_assert!((placement.loads.iter().sum::<f64>() - total as f64).abs() < 1e-6);
            // No other choice of as many copies has a smaller busiest copy.
            let busiest = |copies: &[usize]| loads.iter().zip(copies)
                .map(|(&load, &n)| load as f64 / n as f64).fold(0.0, f64::max);
            let bound = busiest(&placement.copies);
            let fewer: usize = loads.iter()
                .map(|&load| ((load as f64 / (bound * 0.999).max(1e-9)).ceil() as usize).max(1)).sum();
            prop_assert!(bound == 0.0 || fewer > 16 + redundant);
        }
    }
}
