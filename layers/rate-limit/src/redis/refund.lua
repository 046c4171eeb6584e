-- Gives charges back, but not what has come back by itself.
--
-- KEYS: no key twice. ARGV: for each the charge in whole microseconds, what is
-- left of it in parts of a microsecond, and how many such parts a nanosecond
-- has.
--
-- Answers as the script of checks does, of the times after it.
local values = call('MGET', unpack(KEYS))
local ahead, left = {}, nil
for i = 1, #KEYS do
  local iu, ir, den = ARGV[3 * i - 2] + 0, ARGV[3 * i - 1] + 0, ARGV[3 * i] + 0
  local u, r = now, 0
  if values[i] then
    u, r = read(values[i], now, den)
    if u < now + iu or (u == now + iu and r <= ir) then
      call('DEL', KEYS[i])
      u, r = now, 0
    else
      u, r = u - iu, r - ir
      if r < 0 then
        u, r = u - 1, r + den * 1000
      end
      write(KEYS[i], u, r, now, den)
    end
  end
  ahead[i] = u - now
  if r > 0 then
    left = left or {}
    left[i] = r
  end
end
return answer(ahead, left, #KEYS)
