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
pub fn encode(value: f32) -> u8 {
    if value.is_nan() {
        return 0x7f;
    }
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let magnitude = value.abs().min(MAX);
    // From one power of two to the next there are eight codes; those below 2^-6, the subnormal ones, are spaced as
    // those of the next power of two.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let steps = (magnitude * 2f32.powi(3 - exponent)).round_ties_even();
    // A magnitude that rounds up to the next power of two carries into the exponent by itself.
    sign | (((exponent + 6) * 8) as u8 + steps as u8)
}
