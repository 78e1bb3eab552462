//! E4M3: eight bits with four of exponent and three of mantissa, no infinities.

/// The largest number of E4M3.
pub const MAX: f32 = 448.0;

/// The number that a code stands for; NaN for 0x7f and 0xff.
pub fn decode(code: u8) -> f32 {
    let exponent = i32::from((code >> 3) & 0xf);
    let mantissa = f32::from(code & 7);
    let magnitude = match exponent {
        15 if code & 7 == 7 => f32::NAN,
        0 => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if code & 0x80 == 0 {
        magnitude
    } else {
        -magnitude
    }
}

/// What every code stands for.
pub fn decoded() -> [f32; 256] {
    std::array::from_fn(|code| decode(code as u8))
}

/// The code nearest to a number, the even one of two that are equally near. Beyond ±448 it is that of ±448, as
/// GPUs convert; NaN is 0x7f.
#[inline(always)]
pub fn encode(value: f32) -> u8 {
    /// Least normal number, 2^-6.
    const NORMAL: f32 = 0.015_625;
    /// Where neighbours are as far apart as the subnormal numbers are, 2^-9.
    const SUBNORMAL_STEPS: f32 = 16_384.0;

    // Without branches, so that loops become vector code. NaN becomes the largest magnitude, for now.
    let magnitude = value.abs().min(MAX);
    let bits = magnitude.to_bits();
    // Seven bits are cut from the exponent's start and the mantissa's end, after half of the last place was added, or
    // just less before an even number; what carries into the exponent is right there.
    let normal = ((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20).wrapping_sub((127 - 7) << 3);
    let subnormal = (magnitude + SUBNORMAL_STEPS).to_bits() - SUBNORMAL_STEPS.to_bits();
    let code = if magnitude < NORMAL {
        subnormal
    } else {
        normal
    };
    let sign = value.to_bits() >> 24 & 0x80;
    (if value.is_nan() { 0x7f } else { sign | code }) as u8
}
