-- Checks of one cost under one quota, on each key as often as told.
--
-- KEYS: no key twice. ARGV: the charge and the tolerance in whole microseconds;
-- then, or nothing more, what is left of the two in parts of a microsecond and
-- how many such parts a nanosecond has; then how often for each key, or once.
--
-- Answers how far each arrival time lay ahead before, in microseconds; then, if
-- it is not nothing for all, what was left of each.
local iu, tu = ARGV[1] + 0, ARGV[2] + 0
local ir, tr, den = 0, 0, 1
if ARGV[3] then
  ir, tr, den = ARGV[3] + 0, ARGV[4] + 0, ARGV[5] + 0
end
local lu, lr = now + tu, tr
local values = call('MGET', unpack(KEYS))
local ahead, left = {}, nil
for i = 1, #KEYS do
  local value = values[i]
  local u, r = tonumber(value or now), 0
  -- Most are past, or whole and near.
  if not u or not (u - now < 1e14) or u % 1 > 0 then
    u, r = read(value, now, den)
  elseif u < now then
    u = now
  end
  ahead[i] = u - now
  if r > 0 then
    left = left or {}
    left[i] = r
  end
  local changed = false
  if u > lu or (u == lu and r > lr) then
    u, r, changed = lu, lr, true
  end
  for _ = 1, ARGV[i + 5] or 1 do
    local xu, xr = u + iu, r + ir
    if xr >= den * 1000 then
      xu, xr = xu + 1, xr - den * 1000
    end
    if xu > lu or (xu == lu and xr > lr) then break end
    u, r, changed = xu, xr, true
  end
  if changed then
    if r > 0 then
      write(KEYS[i], u, r, now, den)
    else
      -- As `write` does, whose call would cost a tenth of it.
      local ms = format('%d', (u - now + 999) / 1000 + 1)
      call('PSETEX', KEYS[i], ms, format('%d%06d', u / 1000000, u % 1000000))
    end
  end
end
return answer(ahead, left, #KEYS)
