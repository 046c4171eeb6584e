-- Takes tokens ahead: from each key or from none.
--
-- KEYS: no key twice. ARGV: for each what a token costs and how far ahead it
-- may be, each in whole microseconds and what is left in parts of a
-- microsecond, and how many such parts a nanosecond has (in the order charge,
-- charge, parts, tolerance, tolerance); then how many tokens are the least that
-- is of use, how many are needed, and how many more are welcome.
--
-- What is needed is given as far as it is there; of what is left after that an
-- eighth, for the other processes have needs too.
--
-- Answers for each how many tokens it gave, and how far ahead the arrival time
-- lies after that: in microseconds, and what is left in parts of one.
local values = redis.call('MGET', unpack(KEYS))
local us, rs, xus, xrs, healed, given = {}, {}, {}, {}, {}, {}
local all = true
for i = 1, #KEYS do
  local at = 8 * i - 8
  local iu, ir, den = ARGV[at + 1] + 0, ARGV[at + 2] + 0, ARGV[at + 3] + 0
  local lu, lr = now + ARGV[at + 4], ARGV[at + 5] + 0
  local least, need, more = ARGV[at + 6] + 0, ARGV[at + 7] + 0, ARGV[at + 8] + 0
  local u, r = now, 0
  if values[i] then u, r = read(values[i], now, den) end
  if u > lu or (u == lu and r > lr) then
    u, r, healed[i] = lu, lr, true
  end
  -- About as many as fit, the last of them tried exactly.
  local unit = den * 1000
  local left = (lu - u + (lr - r) / unit) / (iu + ir / unit)
  left = math.floor(left + 0.000001)
  local n = math.min(need, left)
  n = n + math.min(more, math.floor((left - n) / 8))
  local xu, xr = u, r
  while n > 0 do
    xr = r + n * ir
    local carry = math.floor(xr / unit)
    xu, xr = u + n * iu + carry, xr - carry * unit
    if xu < lu or (xu == lu and xr <= lr) then break end
    n, xu, xr = n - 1, u, r
  end
  if n < least then all = false end
  us[i], rs[i], xus[i], xrs[i], given[i] = u, r, xu, xr, n
end
local told = {}
for i = 1, #KEYS do
  local n, u, r, den = 0, us[i], rs[i], ARGV[8 * i - 5] + 0
  if all then n, u, r = given[i], xus[i], xrs[i] end
  if n > 0 or healed[i] then write(KEYS[i], u, r, now, den) end
  told[3 * i - 2], told[3 * i - 1], told[3 * i] = n, u - now, r
end
return told
