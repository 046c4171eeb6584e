//! The score: one number for how well all sources are doing.

/// What one source has to say.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    /// 0.0 to 1.0; `None` where it is switched off.
    pub(crate) score: Option<f64>,
    /// Within [`LIGHTEST`] and [`HEAVIEST`].
    pub(crate) weight: f64,
    pub(crate) critical: bool,
}

/// Within these no sum of weights overflows, and none is 0.
pub(crate) const LIGHTEST: f64 = 1e-6;
pub(crate) const HEAVIEST: f64 = 1e6;

/// min(Σwᵢsᵢ / Σwᵢ, the lowest critical sᵢ): never NaN, and in 0.0 to 1.0.
///
/// What is switched off is left out; where nothing is left, nothing is wrong:
/// 1.0.
pub(crate) fn score(parts: impl IntoIterator<Item = Part>) -> f64 {
    let (mut weighted, mut weights, mut cap) = (0.0, 0.0, 1.0_f64);
    for part in parts {
        let Some(score) = part.score else { continue };
        weighted += part.weight * score;
        weights += part.weight;
        if part.critical {
            cap = cap.min(score);
        }
    }
    if weights == 0.0 {
        return 1.0;
    }
    // Rounding may carry the mean past its ends.
    let mean: f64 = weighted / weights;
    mean.min(cap).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn part(score: impl Into<Option<f64>>, weight: f64, critical: bool) -> Part {
        Part {
            score: score.into(),
            weight,
            critical,
        }
    }

    #[test]
    fn it_is_the_weighted_mean() {
        assert_eq!(score([]), 1.0);
        assert_eq!(score([part(0.5, 1.0, false)]), 0.5);
        assert_eq!(score([part(1.0, 3.0, false), part(0.0, 1.0, false)]), 0.75);
    }

    #[test]
    fn the_worst_critical_one_caps_it() {
        let others = [part(1.0, 100.0, false), part(0.5, 1.0, true)];
        assert_eq!(score(others), 0.5);
        let worse = others.into_iter().chain([part(0.0, 1e-6, true)]);
        assert_eq!(score(worse), 0.0);
        // One that is better than the mean does not lift it.
        assert_eq!(score([part(0.0, 1.0, false), part(1.0, 1.0, true)]), 0.5);
    }

    #[test]
    fn what_is_switched_off_is_left_out() {
        assert_eq!(score([part(None, 1.0, true)]), 1.0);
        assert_eq!(score([part(None, 1e6, true), part(0.25, 1.0, false)]), 0.25);
    }

    fn parts() -> impl Strategy<Value = Vec<Part>> {
        let weight = prop_oneof![
            LIGHTEST..=HEAVIEST,
            Just(LIGHTEST),
            Just(HEAVIEST),
            0.1..10.0,
        ];
        let told = prop_oneof![Just(0.0), Just(0.5), Just(1.0), 0.0..=1.0];
        let part = (proptest::option::of(told), weight, any::<bool>());
        let part = part.prop_map(|(score, weight, critical)| Part {
            score,
            weight,
            critical,
        });
        proptest::collection::vec(part, 0..40)
    }

    proptest! {
        /// Against the formula, written out.
        #[test]
        fn it_is_what_the_formula_says(parts in parts()) {
            let on: Vec<(f64, f64, bool)> = parts
                .iter()
                .filter_map(|part| Some((part.score?, part.weight, part.critical)))
                .collect();
            let told = score(parts);
            prop_assert!((0.0..=1.0).contains(&told));
            let expected = if on.is_empty() {
                1.0
            } else {
                let sum: f64 = on.iter().map(|(_, weight, _)| weight).sum();
                let mean: f64 = on.iter().map(|(score, weight, _)| score * (weight / sum)).sum();
                let critical = on.iter().filter(|part| part.2).map(|part| part.0);
                critical.fold(mean, f64::min)
            };
            prop_assert!((told - expected).abs() < 1e-9, "{} and not {}", told, expected);
        }

        /// Whoever gets better makes nothing worse.
        #[test]
        fn it_rises_with_each_source(parts in parts(), which: prop::sample::Index, better in 0.0..=1.0) {
            prop_assume!(!parts.is_empty());
            let before = score(parts.iter().copied());
            let mut parts = parts;
            let part = which.get(&parts).score;
            let index = which.index(parts.len());
            prop_assume!(part.is_some_and(|part| part <= better));
            parts[index].score = Some(better);
            prop_assert!(score(parts) >= before - 1e-9);
        }
    }
}
